#include "isa.h"

#define OSF_TEXT_(x) #x
#define OSF_TEXT(x) OSF_TEXT_(x)

namespace osf::OSF_ISA {

const Kernels kernels = {OSF_TEXT(OSF_ISA), patch_rotate, patch_outer, skew_exp,
                         d_skew_exp,        cayley,       d_cayley,    rotation_step,
                         latent_mse,        d_latent_mse, pixel_l1,    d_pixel_l1};

}  // namespace osf::OSF_ISA

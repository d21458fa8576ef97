#pragma once
#include "batched_product.cuh"
#include "skew_passes.cuh"

// exp of large skew matrices and its adjoint: a fixed sequence of launches on a whole batch, with
// the series of four powers in two levels for all. Only the number of squarings differs between the
// matrices; it is chosen and read on the device, and one launch makes them all.
namespace osf::cuda {

template <class S>
class TiledExponential {
 public:
  using T = Accumulator<S>;
  static constexpr int kForwardMatrices = 9, kAdjointMatrices = 17;

  // Layout of the workspace: matrices [n, B, D, D], sums of rows [3, B, D], progress [2 + B],
  // squarings [B].
  static int64_t workspace_bytes(int64_t B, int64_t D, int matrices) {
    return progress_offset(B, D, matrices) + (2 + B) * int64_t{sizeof(Counter)} +
           B * int64_t{sizeof(int)};
  }

  TiledExponential(int64_t B, int64_t D, int matrices, void* workspace, void* stream)
      : B_(B), D_(D), count_(B * D * D), size_(D * D), stream_(stream) {
    memory_ = static_cast<T*>(workspace);
    sums_ = memory_ + matrices * count_;
    auto* const counters =
        reinterpret_cast<Counter*>(static_cast<char*>(workspace) + progress_offset(B, D, matrices));
    progress_ = {counters, counters + 1, counters + 2};
    squarings_ = reinterpret_cast<int*>(counters + 2 + B);
  }

  cudaError_t forward(const S* a,  // [B, D, D]
                      S* out) {    // [B, D, D]
    T* const R[] = {at(1), at(2)};
    set_generator(a);
    values();
    run({add(product(S_(), K(), -1, R[0]), C(), 1)});
    Squaring<T> squaring;
    for (int i = 0; i < 2; ++i) squaring.product[i][0] = product(R[i], R[i], 0, R[1 - i]);
    squaring.count = 1;
    square(squaring);
    // as in skew_exp_small, one order higher: tensor cores add toward zero, so squarings shrink
    T *const q = at(3), *const defect = at(4), *const factor = at(5), *const polished = at(6);
    choose(R[0], R[1], kOddSquarings, q);
    Products<T> step;
    step.step = 0;
    step.product[0] = scale(transpose(product(q, q, 1, defect)), T(-1));  // I - q^T q
    step.product[0].identity = true;
    run(step);
    step.product[0] = add(scale(product(defect, defect, 1, factor), T(0.375)), defect, T(0.5));
    run(step);
    step.product[0] = add(product(q, factor, 0, polished), q, 1);
    run(step);
    choose(q, polished, kSquared, out);
    return error_;
  }

  // As d_skew_exp_small
  cudaError_t adjoint(const S* grad,  // [B, D, D]
                      const S* a,     // [B, D, D]
                      const S* q,     // [B, D, D]
                      S* out) {       // [B, D, D]
    T *const E = at(10), *const dC = C(), *const dK = at(1), *const R = at(2);
    T *const inverse[] = {at(9), at(3)}, *const turned = at(4);
    const T *const wide_q = widened(q, at(5)), *const wide_grad = widened(grad, at(6));
    Product<T> skew = sum(product(wide_q, wide_grad, -1, E), wide_grad, wide_q, T(-1));
    skew.transposed = true;
    run({skew});
    set_generator(a);
    values();
    run({scale(add(product(S_(), K(), -1, inverse[0]), C(), 1), T(-1)),
         sum(product(S_(), E, 1, dX(1)), E, S_())});
    run({sum(product(X(1), dX(1), 1, dX(2)), dX(1), X(1))});
    run({sum(product(dX(1), X(2), 1, dX(3)), X(1), dX(2)),
         sum(product(dX(2), X(2), 1, dX(4)), X(2), dX(2))});
    pass(sum_powers<T>, count_, const_cast<const T*>(dX(1)), at(16), at(15));
    run({add_low(sum(product(dX(4), even(), 1, dC), X(4), at(16)), 0, dX(1)),
         add_low(sum(product(dX(4), odd(), 1, dK), X(4), at(15)), 1, dX(1))});
    run({add(sum(product(E, K(), -1, R), S_(), dK), dC, T(-1))});
    run({transpose(product(inverse[0], R, -1, E))});
    Squaring<T> squaring;
    for (int i = 0; i < 2; ++i) {
      squaring.product[i][0] = product(E, inverse[i], 0, turned);
      squaring.product[i][1] = product(inverse[i], inverse[i], 0, inverse[1 - i]);
      squaring.product[i][2] =
          add(scale(transpose(product(inverse[i], turned, -1, E)), T(0.5)), E, T(0.5));
    }
    squaring.count = 3;
    square(squaring);
    choose(E, E, kNone, out);
    return error_;
  }

 private:
  static int64_t progress_offset(int64_t B, int64_t D, int matrices) {
    return round_up((matrices * B * D * D + 3 * B * D) * int64_t{sizeof(T)}, 256);
  }

  T* at(int i) const { return memory_ + i * count_; }
  T* S_() const { return at(0); }
  T* X(int power) const { return at(power); }
  T* odd() const { return at(5); }
  T* even() const { return at(6); }
  T* K() const { return at(7); }
  T* C() const { return at(8); }
  T* dX(int power) const { return at(10 + power); }

  static Product<T> product(const T* left, const T* right, int mirror, T* out) {
    Product<T> p;
    p.left[0] = left;
    p.right[0] = right;
    p.mirror = mirror;
    p.out = out;
    return p;
  }
  static Product<T> sum(Product<T> p, const T* left, const T* right, T sign = 1) {
    p.terms = 2;
    p.left[1] = left;
    p.right[1] = right;
    p.sign = sign;
    return p;
  }
  static Product<T> add(Product<T> p, const T* matrix, T coefficient) {
    p.added[p.count] = matrix;
    p.coefficient[p.count++] = coefficient;
    return p;
  }
  static Product<T> transpose(Product<T> p) {
    p.transposed = true;
    return p;
  }
  static Product<T> scale(Product<T> p, T weight) {
    p.weight = weight;
    return p;
  }
  // The terms of the even (0) or odd (1) series with M_1 .. M_4
  Product<T> add_low(Product<T> p, int parity, const T* matrices) const {
    for (int i = 1; i <= kMaxPowers; ++i)
      p = add(p, matrices + (i - 1) * count_, inverse_factorial<T>(2 * i + parity));
    return p;
  }

  template <class... Parameters, class... Arguments>
  void start(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) {
    if (error_ == cudaSuccess) error_ = launch(kernel, blocks, threads, stream_, arguments...);
  }
  // A kernel with a thread per element
  template <class... Parameters, class... Arguments>
  void pass(void (*kernel)(Parameters...), Arguments... arguments) {
    start(kernel, ceil_div(count_, kPassThreads), kPassThreads, arguments...);
  }
  void run(const Products<T>& products) {
    const int64_t across = ceil_div(D_, kProductTile);
    const Divider per_matrix(across * across * products.count);
    start(multiply<T>, B_ * per_matrix.divisor(), kProductThreads, B_, static_cast<int>(D_),
          per_matrix, products, const_cast<const int*>(squarings_));
  }
  void run(std::initializer_list<Product<T>> list) {
    Products<T> products;
    products.count = 0;
    for (const Product<T>& p : list) products.product[products.count++] = p;
    run(products);
  }

  template <class To, class From>
  void choose(const From* in, const From* in_other, Choice choice, To* out) {
    pass(copy<To, From>, count_, size_, in, in_other, choice, const_cast<const int*>(squarings_),
         out);
  }
  const T* widened(const T* in, T*) { return in; }
  template <class In>
  const T* widened(const In* in, T* out) {
    choose(in, in, kNone, out);
    return out;
  }

  void set_generator(const S* a) {
    const int D = static_cast<int>(D_);
    const Divider tiles(ceil_div(D_, 32) * ceil_div(D_, 32));
    start(make_generator<S>, B_ * tiles.divisor(), kPassThreads, B_, D, tiles, a, S_(), progress_);
    run({product(S_(), S_(), 1, X(1))});
    run({product(X(1), X(1), 1, X(2))});
    constexpr int kWarps = kPassThreads / kWarp;
    start(sum_rows<T>, ceil_div(3 * B_ * D_, kWarps), kPassThreads, B_, D,
          const_cast<const T*>(S_()), sums_);
    start(choose_squarings<T>, ceil_div(B_, kWarps), kPassThreads, B_, D,
          const_cast<const T*>(sums_), squarings_, progress_);
    pass(scale_powers<T>, B_, size_, const_cast<const int*>(squarings_), S_());
    run({product(X(1), X(2), 1, X(3)), product(X(2), X(2), 1, X(4))});
  }

  // C and K with exp(S) = C + S K
  void values() {
    pass(sum_powers<T>, count_, const_cast<const T*>(X(1)), even(), odd());
    Product<T> cosine = add_low(product(X(4), even(), 1, C()), 0, X(1));
    Product<T> sinc = add_low(product(X(4), odd(), 1, K()), 1, X(1));
    cosine.identity = sinc.identity = true;
    run({cosine, sinc});
  }

  void square(const Squaring<T>& squaring) {
    const int64_t across = ceil_div(D_, kProductTile);
    const Divider tiles(across * across), per_product(B_ * tiles.divisor());
    start(osf::cuda::square<T>, per_product.divisor() * squaring.count, kProductThreads, B_,
          static_cast<int>(D_), tiles, per_product, squaring, const_cast<const int*>(squarings_),
          progress_);
  }

  const int64_t B_, D_, count_;
  const Divider size_;
  void* const stream_;
  T *memory_, *sums_;
  int* squarings_;
  Progress progress_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace osf::cuda

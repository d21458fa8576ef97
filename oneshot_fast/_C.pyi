compiler: str
cuda_kernels: bool
torch_version: str

def isa() -> str: ...

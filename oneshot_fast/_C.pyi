compiler: str
cuda_architectures: str
torch_version: str

def isa() -> str: ...

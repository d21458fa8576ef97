compiler: str
torch_version: str

def isa() -> str: ...

"""kernelm: a microkernel operating system for language models. Start reading at contract.py."""

__version__ = "0.1.0"

"""`python -m kernelm_cli` is the `kernelm` command."""

from kernelm_cli.app import main

if __name__ == "__main__":
    main()

"""What every member of a kernelm system shares. Start reading at contract.py."""

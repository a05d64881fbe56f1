"""What holds of every good plugin of each contract, beyond its types: `kernelm plugin check` finds the module of a contract here.

Nothing of kernelm imports this while it runs; it needs the package `kernelm` (kernelm.testing.conformance), which plugins don't.
"""

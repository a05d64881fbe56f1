"""The `kernelm` command, and the launcher that parents broker, kernel and services of one machine."""

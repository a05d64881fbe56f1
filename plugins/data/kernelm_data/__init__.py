"""kernelm's data plugin. Reading order: plugin, prepare, account, then the steps as `prepare` calls them."""

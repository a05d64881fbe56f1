"""A third party's plugin that crashes at every start."""

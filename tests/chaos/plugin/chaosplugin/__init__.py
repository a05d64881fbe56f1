"""A third party's plugin for the fault matrix: what it does under load can be checked afterwards, to the last call and step."""

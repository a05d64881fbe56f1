"""The content-addressed store: verified on read, written atomically, pickles refused."""

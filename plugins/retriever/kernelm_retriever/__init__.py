"""`retriever/1`: an index of passages by the vectors of a deployed model, and what is found with it."""

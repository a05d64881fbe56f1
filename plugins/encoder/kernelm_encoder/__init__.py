"""`server/1` for text classifiers: fine-tuned encoders, frozen encoders with a linear head, and linear TF-IDF models."""

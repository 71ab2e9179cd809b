"""Released checkpoints of other people, read into the classes of this book."""

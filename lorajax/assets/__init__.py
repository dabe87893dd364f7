"""The small model and the text of the quickstart, and the builder of both texts and of the tokenizer."""

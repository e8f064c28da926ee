"""What serves the model, the data and the command line; imports nothing from them."""

"""Speed and memory of the product, measured in turns with the methods it is compared with."""

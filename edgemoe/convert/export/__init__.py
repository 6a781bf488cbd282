"""Export of `.moe` files to formats that other programs read."""

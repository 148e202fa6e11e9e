# The quant family's part of the border.

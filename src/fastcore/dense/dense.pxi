# The dense family's part of the border.

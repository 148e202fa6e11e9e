# The aggregate family's part of the border.

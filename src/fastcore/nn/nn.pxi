# The nn family's part of the border.

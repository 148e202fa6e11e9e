# The sparse family's part of the border.

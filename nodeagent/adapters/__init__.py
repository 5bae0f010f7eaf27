"""One module per outside system; the only code that touches anything outside the program."""

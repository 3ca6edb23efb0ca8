"""One policy per file: pure functions that `plan` asks. They say what is due and change nothing."""

"""`narses run`: an experiment file, its runs, and the folder they leave behind."""

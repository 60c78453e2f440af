"""What many tests begin with, one kind of thing per file: data, networks, linear problems, files, processes, runs."""

"""Files and processes: hashes and seals, file names, commands of our own modules, memory, text for terminals."""

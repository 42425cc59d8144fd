"""What a run leaves behind: the clock's times, the journal, the result files; they are read, checked, compared here."""

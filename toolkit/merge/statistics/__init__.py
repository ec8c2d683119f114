"""What data says about the models of a merge: measured in one extra pass, kept on disk beside the unfinished merge."""

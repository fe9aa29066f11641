"""From what a data set is handed out as to its manifest and class list: official archives, copies, folders."""

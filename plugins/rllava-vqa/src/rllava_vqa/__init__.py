"""Visual question answering for rllava: data sets and rewards."""

"""Visual question answering for rllava: data sets, environments and rewards."""

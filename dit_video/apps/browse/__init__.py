"""A page on which a data set is looked at: rows that are sorted and filtered, histograms, thumbnails and clips."""

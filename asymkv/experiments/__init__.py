"""The comparison of a whole table: methods over lengths, ablations one number at a time, results page and plots."""

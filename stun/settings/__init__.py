"""Settings of the jobs. In: overrides in the form of the command line. Out: checked configurations, and their documentation."""

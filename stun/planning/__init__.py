"""Plans. In: a configuration, headers, statistics. Out: which experts are kept, and how many weights every matrix loses."""

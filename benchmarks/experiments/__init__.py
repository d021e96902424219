"""Does alignment help? Small models, many seeds: tasks × variants, with the package's own code.

`plans.py` says what is compared, `__main__.py` runs what is missing from the result file, `page.py` makes the tables of
`docs/does-it-help.md` from that file. What did not help is in the plans like the rest, and stays there."""

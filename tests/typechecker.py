"""The checker of signatures while tests run: beartype; an int is good where a float stands."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

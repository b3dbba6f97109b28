"""What a hostile peer may say, at random, and what may come of it: `make fuzz FUZZ_N=1000000`.

Every case has a number, and is made from the seed and that number alone.
"""

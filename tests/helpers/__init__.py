"""What the tests share: cases, values and gradients, ranks, programs, models.

A test file imports from here, and never from another test file.
"""

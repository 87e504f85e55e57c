"""Times of compiled training and decoding, and what they mean: rates, utilisation, memory, and where the time goes."""

"""Does a training set look bad? (`ema data audit`)"""

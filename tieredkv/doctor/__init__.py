"""tieredkv doctor: is this machine fit?"""

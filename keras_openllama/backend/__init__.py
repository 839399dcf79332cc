"""What knows the internals of Keras, KerasHub and the three backends."""

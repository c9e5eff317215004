"""Parts of the data plane: data sets, decoded images, encodings."""

"""The oracle: is a compiled result as near to the truth as eager's? The truth is the same run in fp64."""

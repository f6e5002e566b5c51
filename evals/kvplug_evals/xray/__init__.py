"""What each layer and KV head keeps and reads of a text, as one page of HTML."""

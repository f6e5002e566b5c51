"""What each layer and KV head keeps and reads of a text: one page of HTML, of the core's choices."""

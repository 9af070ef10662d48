"""What one caller of a service may try so that others wait, and who looks whether they do.

target       where attacks go to, and how they send
bodies       requests that are much work to read
files        pictures that are much work to decode
connections  connections, streams and handshakes that stay
work         valid work: jobs, references, webhooks
corpus       requests that are refused, each once
catalog      all attacks by name; run one
witness      a bystander's jobs and the pulse of the event loop
"""

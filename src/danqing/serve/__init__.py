"""The server: the images API that clients already speak, jobs, metrics, and a page.

`jobs` is what is asked and what became of it. `service` accepts and ends jobs: they wait in
`job_queue`, a `worker` for each device makes their images, `shelf` keeps them to be asked for
again, and `journal` keeps them on disk. `bodies`, `answers` and `app` are the HTTP side with
`json_body`, `form_body` and `sent_images` as its readers and `openapi` as its document; `guards`
stands before it, and `page` is for people.
"""

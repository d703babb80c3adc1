/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * clusterip in nginx: what nginx itself connects to goes through the services of a file, in the kernel.
 *
 *     load_module modules/ngx_clusterip_module.so;
 *     clusterip        /etc/clusterip/clusterip.toml;     # the services
 *     clusterip_cgroup /sys/fs/cgroup/web;                # whose connects; without it: those of nginx's own cgroup
 *     clusterip_plugin libclusterip.so.1;                 # as dlopen finds it
 *     http { server {
 *         location /        { proxy_pass http://10.96.96.96:5201; }
 *         location = /status { clusterip_status; }
 *     } }
 *
 * Who owns what:
 * - The master owns the handle, for it has the privileges and lives as long as nginx. A handle does not survive fork, and
 *   nginx becomes a daemon by fork after the modules' init_module: see before_fork().
 * - A reload goes through the same master, into the same handle: what changes is one store for each service, and what does
 *   not is untouched. The file is judged while the new configuration can still be refused, in init_conf, and applied in
 *   init_module, when nothing else of nginx can refuse it any more.
 * - Workers have nothing: no privileges, and no descriptor by which services could be changed. The counters come to them by
 *   a page of shared memory, which a thread of the master writes once a second.
 */
#include <ngx_config.h>
#include <ngx_core.h>
#include <ngx_http.h>

#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "clusterip_plugin.h"

typedef struct {
	ngx_str_t file, cgroup, plugin;
	ngx_str_t text; /* of the file, as it was judged */
} ngx_clusterip_conf_t;

/*
 * The counters as text, for the workers. `changes` is odd while the text is being written. Workers could write here, too: the
 * master reads nothing of it.
 */
typedef struct {
	atomic_uint changes;
	atomic_uint attached; /* 0: there is no handle, and no text */
	atomic_uint second;   /* of CLOCK_MONOTONIC, when it was written: nobody writes any more when the master has died */
	char text[65536 - 3 * sizeof(atomic_uint)];
} ngx_clusterip_page_t;

/* The fast path of this nginx, in the process that owns it. It outlives each cycle but the last. */
static struct {
	ngx_pid_t owner;
	ngx_cycle_t *cycle; /* whose configuration is in force */
	struct clusterip_plugin plugin;
	clusterip *handle;
	char cgroup[NGX_MAX_PATH], plugin_path[NGX_MAX_PATH];
	pthread_mutex_t mutex; /* a handle is used by one thread at a time: for `handle` */
	pthread_cond_t stop;
	int reporting, stopping;
	pthread_t reporter;
} fast_path = { .mutex = PTHREAD_MUTEX_INITIALIZER };

static ngx_clusterip_page_t *page;

extern ngx_module_t ngx_clusterip_module;

/* --- the counters ------------------------------------------------------------------------------------------------------- */

#define STALE_SECONDS 5

static const char cut[] = "# cut\n"; /* the last line, when not everything fits */

struct report {
	char *at, *end;
	int cut;
};

static void say(struct report *report, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(report->at, (size_t)(report->end - report->at), format, arguments);
	va_end(arguments);
	/* What does not fit ends with the last whole line. */
	if (length < 0 || length >= report->end - report->at)
		report->end = report->at, report->cut = 1;
	else
		report->at += length;
}

static int report_service(const clusterip_service_info *service, const clusterip_backend_info *backend, void *user)
{
	static const char *const states[] = { "active", "drain", "down" };

	if (!backend)
		say(user, "service %s vip %s port %u protocol %s connects %llu refused %llu live %llu\n", service->name,
		    service->vip, service->port, service->protocol == IPPROTO_UDP ? "udp" : "tcp",
		    (unsigned long long)service->connects, (unsigned long long)service->refused,
		    (unsigned long long)service->live);
	else
		say(user, "  backend %s port %u weight %u state %s connects %llu failures %llu live %llu\n", backend->address,
		    backend->port, backend->weight, backend->state < 3 ? states[backend->state] : "unknown",
		    (unsigned long long)backend->connects, (unsigned long long)backend->failures,
		    (unsigned long long)backend->live);
	return ((struct report *)user)->cut; /* ends the visit */
}

static unsigned monotonic_second(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (unsigned)now.tv_sec;
}

/* The caller has the mutex, or there is no reporter. */
static void publish(const char *text, size_t length, unsigned attached)
{
	static unsigned changes;

	atomic_store(&page->changes, ++changes);
	atomic_thread_fence(memory_order_seq_cst);
	ngx_memcpy(page->text, text, length);
	page->text[length] = '\0';
	atomic_store(&page->attached, attached);
	atomic_store(&page->second, monotonic_second());
	atomic_store(&page->changes, ++changes);
}

/* The caller has the mutex. */
static void report(void)
{
	static char text[sizeof page->text];
	struct report report = { text, text + sizeof text - sizeof cut, 0 };

	fast_path.plugin.visit_services(fast_path.handle, report_service, &report, NULL);
	if (report.cut) report.at = (char *)ngx_cpymem(report.at, cut, sizeof cut - 1);
	publish(text, (size_t)(report.at - text), 1);
}

static void *reporter(void *unused)
{
	struct timespec until;

	(void)unused;
	pthread_mutex_lock(&fast_path.mutex);
	while (!fast_path.stopping) {
		report();
		clock_gettime(CLOCK_MONOTONIC, &until);
		++until.tv_sec;
		pthread_cond_timedwait(&fast_path.stop, &fast_path.mutex, &until);
	}
	pthread_mutex_unlock(&fast_path.mutex);
	return NULL;
}

/* nginx's signals are for its main thread, which waits for them by sigsuspend. */
static void start_reporter(ngx_log_t *log)
{
	sigset_t all, before;
	int error;

	fast_path.stopping = 0;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&fast_path.reporter, NULL, reporter, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	fast_path.reporting = error == 0;
	if (error) ngx_log_error(NGX_LOG_EMERG, log, error, "clusterip: no thread for the counters");
}

static void stop_reporter(void)
{
	if (!fast_path.reporting) return;
	pthread_mutex_lock(&fast_path.mutex);
	fast_path.stopping = 1;
	pthread_cond_signal(&fast_path.stop);
	pthread_mutex_unlock(&fast_path.mutex);
	pthread_join(fast_path.reporter, NULL);
}

/* --- the handle --------------------------------------------------------------------------------------------------------- */

static ngx_int_t failed(ngx_log_t *log, ngx_clusterip_conf_t *conf, const char *step, const clusterip_error *error)
{
	ngx_log_error(NGX_LOG_EMERG, log, 0, "clusterip \"%V\": %s: %s", &conf->file, step, error->message);
	return NGX_ERROR;
}

/* A handle with the services of this configuration, not attached: whether this kernel can carry them. */
static ngx_int_t open_loaded(const struct clusterip_plugin *plugin, ngx_clusterip_conf_t *conf, ngx_log_t *log,
                             uint32_t flags, clusterip **ret)
{
	clusterip_options options = { .size = sizeof options, .cgroup_path = (char *)conf->cgroup.data, .flags = flags };
	clusterip_error error = { .size = sizeof error };

	if (plugin->open(&options, ret, &error)) return failed(log, conf, "open", &error);
	if (plugin->load_text(*ret, (char *)conf->text.data, conf->text.len, (char *)conf->file.data, &error)) {
		plugin->close(*ret);
		return failed(log, conf, "load", &error);
	}
	return NGX_OK;
}

/* Detach says it to the kernel: a worker that has only just been forked may have the links yet. */
static void end_fast_path(void)
{
	if (!fast_path.handle) return;
	stop_reporter();
	fast_path.plugin.detach(fast_path.handle, NULL);
	fast_path.plugin.close(fast_path.handle);
	clusterip_plugin_unload(&fast_path.plugin);
	fast_path.handle = NULL;
	publish("", 0, 0);
}

/* A fast path for the cgroup and by the plugin of this configuration; an old one ends when the new one is attached. */
static ngx_int_t begin_fast_path(ngx_clusterip_conf_t *conf, ngx_log_t *log)
{
	clusterip_error error = { .size = sizeof error };
	struct clusterip_plugin plugin;
	clusterip *handle;
	const char *why = clusterip_plugin_load(&plugin, (char *)conf->plugin.data);

	if (why) {
		ngx_log_error(NGX_LOG_EMERG, log, 0, "clusterip_plugin \"%V\": %s", &conf->plugin, why);
		clusterip_plugin_unload(&plugin);
		return NGX_ERROR;
	}
	if (open_loaded(&plugin, conf, log, CLUSTERIP_BACKGROUND, &handle) != NGX_OK) {
		clusterip_plugin_unload(&plugin);
		return NGX_ERROR;
	}
	if (plugin.attach(handle, &error)) {
		plugin.close(handle);
		clusterip_plugin_unload(&plugin);
		return failed(log, conf, "attach", &error);
	}
	/* What does not work is said. It may yet: another fast path on the same cgroup may decide first until that ends. */
	if (plugin.canary(handle, NULL, &error)) (void)failed(log, conf, "canary", &error);
	end_fast_path();
	fast_path.plugin = plugin;
	fast_path.handle = handle;
	ngx_cpystrn((u_char *)fast_path.cgroup, conf->cgroup.data, sizeof fast_path.cgroup);
	ngx_cpystrn((u_char *)fast_path.plugin_path, conf->plugin.data, sizeof fast_path.plugin_path);
	start_reporter(log);
	ngx_log_error(NGX_LOG_NOTICE, log, 0, "clusterip \"%V\": attached to %V by %V, version %s", &conf->file,
	              &conf->cgroup, &conf->plugin, plugin.version_string());
	return NGX_OK;
}

static ngx_int_t change_services(ngx_clusterip_conf_t *conf, ngx_log_t *log)
{
	clusterip_error error = { .size = sizeof error };
	const char *step = "load";
	int code;

	pthread_mutex_lock(&fast_path.mutex);
	code = fast_path.plugin.load_text(fast_path.handle, (char *)conf->text.data, conf->text.len, (char *)conf->file.data,
	                                  &error);
	if (!code) {
		step = "canary";
		code = fast_path.plugin.canary(fast_path.handle, NULL, &error);
	}
	/* Somebody has detached it, or its cgroup was removed and made again: a load does not see that. */
	if (code == -ENOTCONN) {
		(void)failed(log, conf, step, &error);
		step = "attach";
		code = fast_path.plugin.attach(fast_path.handle, &error);
		if (!code) {
			step = "canary";
			code = fast_path.plugin.canary(fast_path.handle, NULL, &error);
		}
		if (!code) ngx_log_error(NGX_LOG_NOTICE, log, 0, "clusterip \"%V\": attached again", &conf->file);
	}
	report();
	pthread_mutex_unlock(&fast_path.mutex);
	return code ? failed(log, conf, step, &error) : NGX_OK;
}

/* Makes what serves that of this cycle's configuration. On failure, what has served serves on, as the cycle's own. */
static ngx_int_t serve(ngx_cycle_t *cycle)
{
	ngx_clusterip_conf_t *conf = (ngx_clusterip_conf_t *)ngx_get_conf(cycle->conf_ctx, ngx_clusterip_module);

	fast_path.owner = ngx_pid;
	fast_path.cycle = cycle;
	if (!conf->file.len) {
		end_fast_path();
		return NGX_OK;
	}
	if (fast_path.handle && ngx_strcmp(fast_path.cgroup, conf->cgroup.data) == 0 &&
	    ngx_strcmp(fast_path.plugin_path, conf->plugin.data) == 0)
		return change_services(conf, cycle->log);
	return begin_fast_path(conf, cycle->log);
}

/* --- the life of nginx -------------------------------------------------------------------------------------------------- */

/*
 * nginx has no hook that runs in the master once it is a daemon: init_module comes before. What comes next in the master is
 * the fork of its first worker, and of that the C library tells us. Later forks find everything in place.
 */
static void before_fork(void)
{
	ngx_core_conf_t *core = (ngx_core_conf_t *)ngx_get_conf(ngx_cycle->conf_ctx, ngx_core_module);

	if (ngx_process != NGX_PROCESS_MASTER || fast_path.cycle == ngx_cycle) return;
	if (core->daemon && !ngx_daemonized) return; /* this is the fork of the daemon */
	/* init_conf has seen the services loaded, so this is rare. nginx ends rather than serve what it cannot reach. */
	if (serve((ngx_cycle_t *)ngx_cycle) != NGX_OK) kill(ngx_pid, SIGTERM);
}

/* The pool of a cycle ends: at a reload that of the old one, when the new one is in force; at quit the last one. */
static void end_cycle(void *cycle)
{
	/* Workers have copies of all this, and end their cycle, too. */
	if (fast_path.cycle == cycle && fast_path.owner == ngx_pid) end_fast_path();
}

static ngx_int_t init_module(ngx_cycle_t *cycle)
{
	static int prepared;
	pthread_condattr_t monotonic;
	ngx_pool_cleanup_t *cleanup;

	if (ngx_test_config) return NGX_OK;
	if (!prepared) {
		page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (page == MAP_FAILED || pthread_atfork(before_fork, NULL, NULL)) return NGX_ERROR;
		if (pthread_condattr_init(&monotonic) || pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC) ||
		    pthread_cond_init(&fast_path.stop, &monotonic))
			return NGX_ERROR;
		prepared = 1;
	}
	/* The pool ends what it was asked last first: this, before it unloads this module. */
	cleanup = ngx_pool_cleanup_add(cycle->pool, 0);
	if (!cleanup) return NGX_ERROR;
	cleanup->handler = end_cycle;
	cleanup->data = cycle;
	/* Not at the start: nginx is no daemon yet. An error here would end nginx, which serves; it is logged. */
	if (!ngx_is_init_cycle(cycle->old_cycle)) (void)serve(cycle);
	return NGX_OK;
}

/* In each worker, with its privileges gone; and in the only process there is with `master_process off`. */
static ngx_int_t init_process(ngx_cycle_t *cycle)
{
	char path[64], what[32];
	struct dirent *entry;
	DIR *directory;

	if (ngx_process == NGX_PROCESS_SINGLE) return serve(cycle);
	/*
	 * What the master's handle has is none of a worker's business: whoever took it over could change services by the maps, and
	 * detach by the links. So what is attached ends with the master, also if that is killed.
	 */
	directory = opendir("/proc/self/fd");
	if (!directory) {
		ngx_log_error(NGX_LOG_EMERG, cycle->log, ngx_errno, "clusterip: no /proc/self/fd, by which a worker closes what is not its own");
		return NGX_ERROR;
	}
	while ((entry = readdir(directory))) {
		ngx_memzero(what, sizeof what);
		snprintf(path, sizeof path, "/proc/self/fd/%.16s", entry->d_name);
		if (readlink(path, what, sizeof what - 1) < 0) continue;
		if (ngx_strcmp(what, "anon_inode:bpf-map") == 0 || ngx_strcmp(what, "anon_inode:bpf-prog") == 0 ||
		    ngx_strcmp(what, "anon_inode:bpf_link") == 0 || ngx_strcmp(what, "anon_inode:bpf-link") == 0)
			close(atoi(entry->d_name));
	}
	closedir(directory);
	return NGX_OK;
}

/* --- the configuration -------------------------------------------------------------------------------------------------- */

struct mistakes {
	ngx_clusterip_conf_t *conf;
	ngx_log_t *log;
};

static void on_mistake(const clusterip_error *mistake, void *user)
{
	struct mistakes *mistakes = user;

	ngx_log_error(NGX_LOG_EMERG, mistakes->log, 0, "%V:%uD:%uD: %s", &mistakes->conf->file, mistake->line,
	              mistake->column, mistake->message);
}

/* Once, so that what is applied is what was judged. */
static ngx_int_t read_text(ngx_cycle_t *cycle, ngx_clusterip_conf_t *conf)
{
	const char *why;
	char *text = clusterip_read_file((char *)conf->file.data, 16, &conf->text.len, &why);

	if (!text) {
		ngx_log_error(NGX_LOG_EMERG, cycle->log, 0, "clusterip \"%V\": %s", &conf->file, why);
		return NGX_ERROR;
	}
	conf->text.data = ngx_pnalloc(cycle->pool, conf->text.len + 1);
	if (conf->text.data) ngx_memcpy(conf->text.data, text, conf->text.len);
	free(text);
	return conf->text.data ? NGX_OK : NGX_ERROR;
}

/* `nginx -t` and `nginx -s` have neither the privileges nor the cgroup of what serves. */
static int only_looks(void)
{
	return ngx_test_config || ngx_process == NGX_PROCESS_SIGNALLER;
}

/*
 * The last moment to refuse a configuration: `nginx -t` and a start end with an error, and at a reload the old one serves on.
 */
static ngx_int_t judge(ngx_cycle_t *cycle, ngx_clusterip_conf_t *conf, const struct clusterip_plugin *plugin)
{
	struct mistakes mistakes = { conf, cycle->log };
	clusterip *trial;

	if (read_text(cycle, conf) != NGX_OK) return NGX_ERROR;
	if (plugin->check_text((char *)conf->text.data, conf->text.len, (char *)conf->file.data, on_mistake, &mistakes))
		return NGX_ERROR;
	/* What serves needs privileges for this, and whether the kernel can shows by trying. */
	if (only_looks()) return NGX_OK;
	if (open_loaded(plugin, conf, cycle->log, 0, &trial) != NGX_OK) return NGX_ERROR;
	plugin->close(trial);
	return NGX_OK;
}

static char *init_conf(ngx_cycle_t *cycle, void *data)
{
	ngx_clusterip_conf_t *conf = data;
	struct clusterip_plugin plugin;
	const char *why;
	ngx_int_t judged;

	if (!conf->file.len) return NGX_CONF_OK;
	if (!conf->plugin.len) conf->plugin = (ngx_str_t)ngx_string("libclusterip.so.1");
	if (!conf->cgroup.len && !only_looks()) {
		conf->cgroup.data = ngx_pnalloc(cycle->pool, NGX_MAX_PATH);
		if (!conf->cgroup.data) return NGX_CONF_ERROR;
		why = clusterip_own_cgroup((char *)conf->cgroup.data, NGX_MAX_PATH);
		if (why) {
			ngx_log_error(NGX_LOG_EMERG, cycle->log, 0, "clusterip_cgroup is missing: %s", why);
			return NGX_CONF_ERROR;
		}
		conf->cgroup.len = ngx_strlen(conf->cgroup.data);
	}
	if (ngx_conf_full_name(cycle, &conf->file, 1) != NGX_OK) return NGX_CONF_ERROR;
	why = clusterip_plugin_load(&plugin, (char *)conf->plugin.data);
	if (why) ngx_log_error(NGX_LOG_EMERG, cycle->log, 0, "clusterip_plugin \"%V\": %s", &conf->plugin, why);
	judged = why ? NGX_ERROR : judge(cycle, conf, &plugin);
	clusterip_plugin_unload(&plugin);
	return judged == NGX_OK ? NGX_CONF_OK : NGX_CONF_ERROR;
}

static void *create_conf(ngx_cycle_t *cycle)
{
	return ngx_pcalloc(cycle->pool, sizeof(ngx_clusterip_conf_t));
}

static ngx_command_t commands[] = {
	{ ngx_string("clusterip"), NGX_MAIN_CONF | NGX_DIRECT_CONF | NGX_CONF_TAKE1, ngx_conf_set_str_slot, 0,
	  offsetof(ngx_clusterip_conf_t, file), NULL },
	{ ngx_string("clusterip_cgroup"), NGX_MAIN_CONF | NGX_DIRECT_CONF | NGX_CONF_TAKE1, ngx_conf_set_str_slot, 0,
	  offsetof(ngx_clusterip_conf_t, cgroup), NULL },
	{ ngx_string("clusterip_plugin"), NGX_MAIN_CONF | NGX_DIRECT_CONF | NGX_CONF_TAKE1, ngx_conf_set_str_slot, 0,
	  offsetof(ngx_clusterip_conf_t, plugin), NULL },
	ngx_null_command
};

static ngx_core_module_t core_context = { ngx_string("clusterip"), create_conf, init_conf };

ngx_module_t ngx_clusterip_module = {
	NGX_MODULE_V1, &core_context, commands, NGX_CORE_MODULE,
	NULL,         /* init_master: nginx never calls it */
	init_module,  /* in the master: at the start before the daemon's fork, and at each reload */
	init_process, /* in each worker */
	NULL, NULL, NULL, NULL,
	NGX_MODULE_V1_PADDING
};

/* --- clusterip_status --------------------------------------------------------------------------------------------------- */

static ngx_int_t send_status(ngx_http_request_t *request)
{
	ngx_chain_t chain = { NULL, NULL };
	unsigned before, attached, tries = 0;
	ngx_buf_t *buffer;
	ngx_int_t status;

	if (!(request->method & (NGX_HTTP_GET | NGX_HTTP_HEAD))) return NGX_HTTP_NOT_ALLOWED;
	status = ngx_http_discard_request_body(request);
	if (status != NGX_OK) return status;
	buffer = ngx_create_temp_buf(request->pool, sizeof page->text);
	if (!buffer) return NGX_HTTP_INTERNAL_SERVER_ERROR;
	/* Again, if the master has been writing meanwhile: that is one copy of the page. */
	do {
		if (tries++ == 10) return NGX_HTTP_SERVICE_UNAVAILABLE;
		before = atomic_load(&page->changes);
		attached = atomic_load(&page->attached);
		ngx_memcpy(buffer->pos, page->text, sizeof page->text);
		atomic_thread_fence(memory_order_seq_cst);
	} while (before % 2 || before != atomic_load(&page->changes));
	if (!attached || monotonic_second() - atomic_load(&page->second) > STALE_SECONDS) return NGX_HTTP_SERVICE_UNAVAILABLE;
	buffer->last = buffer->pos + ngx_strnlen(buffer->pos, sizeof page->text);
	buffer->last_buf = request == request->main;
	buffer->last_in_chain = 1;
	chain.buf = buffer;
	ngx_str_set(&request->headers_out.content_type, "text/plain");
	request->headers_out.status = NGX_HTTP_OK;
	request->headers_out.content_length_n = buffer->last - buffer->pos;
	if (buffer->last == buffer->pos) request->header_only = 1;
	status = ngx_http_send_header(request);
	if (status == NGX_ERROR || status > NGX_OK || request->header_only) return status;
	return ngx_http_output_filter(request, &chain);
}

static char *set_status(ngx_conf_t *cf, ngx_command_t *command, void *unused)
{
	ngx_http_core_loc_conf_t *location = ngx_http_conf_get_module_loc_conf(cf, ngx_http_core_module);

	(void)command, (void)unused;
	location->handler = send_status;
	return NGX_CONF_OK;
}

static ngx_command_t status_commands[] = {
	{ ngx_string("clusterip_status"), NGX_HTTP_LOC_CONF | NGX_CONF_NOARGS, set_status, 0, 0, NULL },
	ngx_null_command
};

static ngx_http_module_t status_context = { NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL };

ngx_module_t ngx_http_clusterip_status_module = {
	NGX_MODULE_V1, &status_context, status_commands, NGX_HTTP_MODULE, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
	NGX_MODULE_V1_PADDING
};

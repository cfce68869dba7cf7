#include "calls.h"

#include <dlfcn.h>
#include <stddef.h>

functions_t *thief_load(const char *path) {
	void *lib = dlopen(path, RTLD_LAZY);
	if (lib == NULL) return NULL;
	ulong_t (*get)(functions_t **) = (ulong_t(*)(functions_t **))dlsym(lib, "C_GetFunctionList");
	functions_t *f = NULL;
	if (get == NULL || get(&f) != CKR_OK) return NULL;
	return f;
}

ulong_t thief_attributes(functions_t *f, ulong_t session, ulong_t object, attribute_t *t, ulong_t n) {
	return f->call[GET_ATTRIBUTE_VALUE](session, object, t, n);
}

ulong_t thief_copy(functions_t *f, ulong_t session, ulong_t object, attribute_t *t, ulong_t n, ulong_t *handle) {
	return f->call[COPY_OBJECT](session, object, t, n, handle);
}

ulong_t thief_digest_key(functions_t *f, ulong_t session, ulong_t hash, ulong_t object, byte_t *out, ulong_t *len) {
	mechanism_t m = {hash, NULL, 0};
	ulong_t rv = f->call[DIGEST_INIT](session, &m);
	if (rv != CKR_OK) return rv;
	rv = f->call[DIGEST_KEY](session, object);
	ulong_t end = f->call[DIGEST_FINAL](session, out, len);
	return rv != CKR_OK ? rv : end;
}

ulong_t thief_unwrap(unwrap_t *u, ulong_t *handle) {
	if (u->mechanism.len != 0) u->mechanism.param = &u->oaep;
	return u->f->call[UNWRAP_KEY](u->session, &u->mechanism, u->key, u->blob, u->blob_len, u->template, u->count, handle);
}

ulong_t thief_unwrap_null(unwrap_t *u, int without) {
	ulong_t handle = 0;
	if (u->mechanism.len != 0) u->mechanism.param = &u->oaep;
	return u->f->call[UNWRAP_KEY](u->session, without == NO_MECHANISM ? NULL : &u->mechanism, u->key,
	                              without == NO_BLOB ? NULL : u->blob, u->blob_len,
	                              without == NO_TEMPLATE ? NULL : u->template, u->count,
	                              without == NO_HANDLE ? NULL : &handle);
}
